-- The operations a client may call, by name; the comment beside each lists its arguments.

local operations = {}

function operations.create() -- spec, slots, event
  if exists() then return 0 end
  call('SET', SPEC, a[1])
  call('HSET', HEAD, 'born', life, 'slots', a[2])
  append('created', '', a[3])
  return 1
end

function operations.scale() -- slots, event
  if ended() or not exists() then return 0 end
  local changes = number_in('slots', 0) ~= a[1]
  call('HSET', HEAD, 'slots', a[1])
  if changes then append('scaled', a[1], a[2]) end
  return 1
end

function operations.reopen() -- event
  if not exists() then return 0 end
  local outcome = call('HGET', HEAD, 'outcome')
  if outcome and unpack_blob(outcome)[1] == 'finished' then return 0 end
  call('HDEL', HEAD, 'outcome')
  call('DEL', SUSPECTS, ACCUSATIONS, LEASES, READY)
  append('resumed', '', a[1])
  return 1
end

function operations.contact() -- peer, doing, its step, ready, {{accused, kind}, …}
  local peer = a[1]
  if may_hold_lease(peer) then
    -- Ten of these arrive per second and peer, and each logged one costs a sync of the disk.
    -- What a crash may lose of them costs nothing, so only the first renewal in each half of a
    -- lease's life is logged: a lease read back after a crash is short by half its life at most.
    local half, renewed = lease_ttl / 2, tonumber(call('HGET', LEASES, peer))
    local synced = renewed and math.floor((renewed - lease_ttl) / half) == math.floor(now / half)
    if synced then redis.set_repl(redis.REPL_NONE) end
    call('HSET', LEASES, peer, exact(now + lease_ttl))
    call('HSET', DOING, peer, a[2])
    if a[4] >= 0 then call('HSET', READY, peer, a[4]) end
    local member = is_member(peer)
    if member then
      for _, accusation in ipairs(a[5]) do
        call('HSET', ACCUSATIONS, peer .. ' ' .. accusation[1],
          exact(now + accusation_ttl) .. ' ' .. accusation[2])
      end
    end
    if synced then redis.set_repl(redis.REPL_ALL) end
    if member then acquit(a[3]) end
  end
  return snapshot()
end

function operations.read() return snapshot() end

function operations.grant() -- slot, generation, token, by, event
  local slot, generation, token, by = a[1], a[2], a[3], a[4]
  if ended() or slot < 0 or slot >= number_in('slots', 0) then return 0 end
  local last, view = grant_of(slot), current_view()
  if generation ~= (last and last.generation or 0) + 1 then return 0 end
  local occupant
  for _, peer in ipairs(view and view.members or {}) do
    if slot_of(peer) == slot then occupant = occupant or peer end
  end
  if occupant and by ~= occupant and any_leased(view.members) then return 0 end
  local succession = occupant and by == occupant and last and last.claimant == occupant
  if not succession and not grant_is_open(last, view) then return 0 end
  local fails = 0
  if last and not succession and last.fails >= 0 then fails = last.fails + 1 end
  put_grant({
    slot = slot, generation = generation, token = token, granted_at = now,
    expires_at = now + grant_ttl, claimant = '', claimed_at = 0, fails = fails,
  })
  append('granted', string.format('%d.%d', slot, generation), a[5])
  return 1
end

function operations.claim() -- slot, generation, token, peer, event
  local grant, peer = grant_of(a[1]), a[4]
  if ended() or not grant or grant.generation ~= a[2] or grant.token ~= a[3]
    or grant.claimant ~= '' or now >= grant.expires_at then
    return 0
  end
  grant.claimant, grant.claimed_at = peer, now
  put_grant(grant)
  call('HSET', LEASES, peer, exact(now + lease_ttl))
  append('claimed', peer, a[5])
  return 1
end

function operations.admit_hardware() -- probe
  local probe = call('HGET', HEAD, 'probe')
  if probe and probe ~= '' then return probe end
  call('HSET', HEAD, 'probe', a[1])
  return a[1]
end

function operations.propose() return propose(a) end

function operations.restore() -- spec, slots, proposal
  if not exists() then
    call('SET', SPEC, a[1])
    call('HSET', HEAD, 'born', '', 'slots', a[2])
  end
  return propose(a[3])
end

function operations.leave() -- peer, cause, event
  local peer, cause = a[1], a[2]
  if not may_hold_lease(peer) then return 0 end
  if cause ~= '' then suspect(peer, cause) end
  call('HDEL', LEASES, peer)
  call('HDEL', READY, peer)
  call('HSET', DEPARTED, peer, cause)
  append('left', peer, a[3])
  return 1
end

function operations.blame() -- peer, cause
  local stored = call('HGETALL', SUSPECTS)
  for i = 1, #stored, 2 do
    local record, changes = unpack_blob(stored[i + 1]), false
    for _, death in ipairs(record[3]) do
      if death[1] == a[1] and death[4] == '' then
        death[4], changes = a[2], true
      end
    end
    if changes then call('HSET', SUSPECTS, stored[i], pack(record)) end
  end
  return 1
end

function operations.checkpointed() -- step, event
  if a[1] <= number_in('checkpoint', -1) then return 0 end
  call('HSET', HEAD, 'checkpoint', a[1])
  append('checkpoint', a[1], a[2])
  return 1
end

function operations.finish() -- outcome, event
  if call('HSETNX', HEAD, 'outcome', a[1]) == 1 then append('outcome', '', a[2]) end
  return call('HGET', HEAD, 'outcome')
end

function operations.event() -- kind, key, fields
  local added = call('ZADD', SEEN, 'NX', exact(now), a[1] .. '\0' .. a[2])
  if added == 0 then return 0 end
  call('ZREMRANGEBYRANK', SEEN, 0, -EVENTS_LIMIT - 1)
  append(a[1], a[2], a[3])
  return 1
end

return operations[ARGV[1]]()
