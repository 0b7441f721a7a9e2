-- The rules of fault/ledger.py inside a Redis-protocol server: one script, one call per operation.
--
-- ledger.py is the specification; the names here are its own, and
-- tests/fault/test_registry_conformance.py holds the two together. The script is this folder's
-- records.lua, views.lua and operations.lua, in this order and in one scope. It runs alone, and its
-- logged writes reach the append-only file all or none. fault/codec.py has the layout of the values.
--
-- KEYS  the twelve below, all of one hash slot
-- ARGV  operation, now ('' for the server's clock), life, timing (msgpack), arguments (msgpack)
--
-- Times are seconds as IEEE doubles, compared here and never by key expiry, so that they mean what
-- they mean in the Ledger. Stored as text they carry 17 digits, which is exact.

local HEAD, SPEC, MEMBERS, LEASES, READY, DOING = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local DEPARTED, GRANTS, ACCUSATIONS, SUSPECTS = KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local EVENTS, SEEN = KEYS[11], KEYS[12]

local SUSPECTS_LIMIT = 64
local EVENTS_LIMIT = 100000
local CRASHES = { silent = true, lease = true }

local call, pack, unpack_blob = redis.call, cmsgpack.pack, cmsgpack.unpack
local lease_ttl, accusation_ttl, grant_ttl, join_timeout = unpack(unpack_blob(ARGV[4]))
local a = unpack_blob(ARGV[5])
local life = ARGV[3]
local now = tonumber(ARGV[2])
if not now then
  local clock = call('TIME')
  now = clock[1] + clock[2] / 1000000
end

-- records -------------------------------------------------------------------------------------

local function exact(number) return string.format('%.17g', number) end
local function slot_of(peer) return tonumber(string.match(peer, '^(%d+)')) end
local function generation_of(peer) return tonumber(string.match(peer, '^%d+%.(%d+)')) end

local function number_in(field, default) return tonumber(call('HGET', HEAD, field)) or default end
local function ended() return call('HEXISTS', HEAD, 'outcome') == 1 end
local function exists() return call('STRLEN', SPEC) > 0 end

local function current_view()
  local blob = call('HGET', HEAD, 'view')
  if not blob then return nil end
  local number, id, members = unpack(unpack_blob(blob))
  return { number = number, id = id, members = members }
end

local function is_member(peer) return call('SISMEMBER', MEMBERS, peer) == 1 end

local function grant_of(slot)
  local blob = call('HGET', GRANTS, slot)
  if not blob then return nil end
  local g = unpack_blob(blob)
  return {
    slot = g[1], generation = g[2], token = g[3], granted_at = g[4], expires_at = g[5],
    claimant = g[6], claimed_at = g[7], fails = g[8],
  }
end

local function put_grant(g)
  call('HSET', GRANTS, g.slot, pack({
    g.slot, g.generation, g.token, g.granted_at, g.expires_at, g.claimant, g.claimed_at, g.fails,
  }))
end

local function append(kind, key, fields)
  call('XADD', EVENTS, 'MAXLEN', '~', EVENTS_LIMIT, '*',
    'kind', kind, 'key', key, 'time', exact(now), 'fields', fields)
end

-- leases --------------------------------------------------------------------------------------

local function leased(peer) return (tonumber(call('HGET', LEASES, peer)) or 0) > now end

local function may_hold_lease(peer)
  if call('HEXISTS', DEPARTED, peer) == 1 then return false end
  if is_member(peer) then return true end
  local grant = grant_of(slot_of(peer))
  return grant ~= nil and grant.claimant == peer
end

local function acquit(step)
  for _, key in ipairs(call('HKEYS', SUSPECTS)) do
    if tonumber(string.match(key, ':(%-?%d+)$')) < step then call('HDEL', SUSPECTS, key) end
  end
end

local function snapshot()
  local leases, holders = call('HGETALL', LEASES), {}
  for i = 1, #leases, 2 do
    if tonumber(leases[i + 1]) <= now then
      call('HDEL', LEASES, leases[i])
      call('HDEL', READY, leases[i])
    else
      holders[#holders + 1] = leases[i]
    end
  end
  local stored, accusations = call('HGETALL', ACCUSATIONS), {}
  for i = 1, #stored, 2 do
    local expiry, kind = string.match(stored[i + 1], '^(%S+) (.*)$')
    if tonumber(expiry) <= now then
      call('HDEL', ACCUSATIONS, stored[i])
    else
      accusations[#accusations + 1] = stored[i]
      accusations[#accusations + 1] = kind
    end
  end
  return pack({
    now,
    call('HMGET', HEAD, 'born', 'view', 'outcome', 'checkpoint', 'slots', 'highest'),
    holders,
    call('HGETALL', READY),
    accusations,
    call('HVALS', GRANTS),
    call('HGETALL', DOING),
    call('HKEYS', DEPARTED),
    call('HVALS', SUSPECTS),
  })
end

-- grants --------------------------------------------------------------------------------------

local function grant_is_open(grant, view)
  if not grant then return true end
  if grant.claimant == '' then return now >= grant.expires_at end
  if not leased(grant.claimant) then
    return now >= grant.claimed_at + lease_ttl
      or call('HEXISTS', DEPARTED, grant.claimant) == 1 or grant.fails < 0
  end
  local member = view ~= nil and is_member(grant.claimant)
  return not member and now >= grant.claimed_at + join_timeout
end
