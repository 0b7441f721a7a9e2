-- Whether a proposed view may replace the current one, and what follows when it does.

-- deaths that mean something --------------------------------------------------------------------

local function suspect(peer, cause)
  local blob = call('HGET', DOING, peer)
  if not blob then return end
  local step, _, computing, near_deadline = unpack(unpack_blob(blob))
  if computing < 0 or near_deadline then return end
  local key = string.format('%d:%d', computing, step)
  local known = call('HGET', SUSPECTS, key)
  if not known and call('HLEN', SUSPECTS) >= SUSPECTS_LIMIT then return end
  local record = known and unpack_blob(known) or { computing, step, {} }
  for _, death in ipairs(record[3]) do
    if death[1] == peer then return end
  end
  local grant = grant_of(slot_of(peer))
  local claimed_at = grant and grant.claimant == peer and grant.claimed_at or 0
  table.insert(record[3], { peer, now, claimed_at, cause })
  call('HSET', SUSPECTS, key, pack(record))
end

-- views ---------------------------------------------------------------------------------------

local function any_leased(peers)
  for _, peer in ipairs(peers) do
    if leased(peer) then return true end
  end
  return false
end

local function set_of(peers)
  local set = {}
  for _, peer in ipairs(peers) do set[peer] = true end
  return set
end

local function is_accused(peer)
  local stored = call('HGETALL', ACCUSATIONS)
  for i = 1, #stored, 2 do
    if string.match(stored[i], ' (.*)$') == peer
      and tonumber(string.match(stored[i + 1], '^%S+')) > now then
      return true
    end
  end
  return false
end

local function may_remove(peer, kind, proposal)
  if kind == 'swap' then return proposal.proposer == peer end
  if kind == 'scaled' then return slot_of(peer) >= proposal.slots end
  if kind == 'left' then return call('HEXISTS', DEPARTED, peer) == 1 end
  if kind == 'lease' then return not leased(peer) end
  return is_accused(peer)
end

local function grounds_hold(proposal, old, before)
  if proposal.kind == 'first' and old then return false end
  if proposal.kind == 'revive' then
    if any_leased(before) then return false end
  elseif proposal.kind == 'change' then
    if not set_of(before)[proposal.proposer] then return false end
    local reasons, stays = {}, set_of(proposal.members)
    for _, removal in ipairs(proposal.removals) do reasons[removal[1]] = removal[2] end
    for _, peer in ipairs(before) do
      if not stays[peer] and not may_remove(peer, reasons[peer] or '', proposal) then
        return false
      end
    end
  end
  local was = set_of(before)
  for _, peer in ipairs(proposal.members) do
    if not was[peer] then
      local grant = grant_of(slot_of(peer))
      if not grant or grant.claimant ~= peer or not leased(peer) then return false end
    end
  end
  return true
end

local function regain(proposal)
  for _, peer in ipairs(proposal.members) do
    local slot, generation = slot_of(peer), generation_of(peer)
    local grant = grant_of(slot)
    if not grant or grant.generation <= generation then
      put_grant({
        slot = slot, generation = generation, token = '', granted_at = now, expires_at = now,
        claimant = peer, claimed_at = now, fails = -1,
      })
    end
    call('HSETNX', LEASES, peer, exact(now + lease_ttl))
  end
  if number_in('slots', 0) == 0 then call('HSET', HEAD, 'slots', proposal.slots) end
end

local function forget(peer)
  for _, key in ipairs({ LEASES, READY, DOING, DEPARTED }) do call('HDEL', key, peer) end
  for _, pair in ipairs(call('HKEYS', ACCUSATIONS)) do
    local accuser, accused = string.match(pair, '^(%S+) (.*)$')
    if accuser == peer or accused == peer then call('HDEL', ACCUSATIONS, pair) end
  end
end

local function install(proposal, before)
  local was, stays = set_of(before), set_of(proposal.members)
  for _, removal in ipairs(proposal.removals) do
    local peer, kind = removal[1], removal[2]
    if CRASHES[kind] and was[peer] then suspect(peer, call('HGET', DEPARTED, peer) or '') end
  end
  if proposal.kind == 'revive' then
    for _, peer in ipairs(before) do
      if call('HEXISTS', DEPARTED, peer) == 0 then suspect(peer, '') end
    end
  end
  for _, peer in ipairs(before) do
    if not stays[peer] then forget(peer) end
  end
  call('DEL', MEMBERS)
  for _, peer in ipairs(proposal.members) do
    local grant = grant_of(slot_of(peer))
    if grant and grant.claimant == peer and grant.fails ~= -1 then
      grant.fails = -1
      put_grant(grant)
    end
    call('HDEL', READY, peer)
    call('SADD', MEMBERS, peer)
  end
  call('HSET', HEAD, 'view', proposal.view, 'highest', proposal.number)
  append('view', string.format('%d.%s', proposal.number, proposal.id), proposal.event)
end

local function propose(p)
  local proposal = {
    proposer = p[1], kind = p[2], expected_number = p[3], expected_id = p[4], number = p[5],
    id = p[6], members = p[7], slots = p[8], removals = p[9], view = p[10], event = p[11],
  }
  if ended() or not exists() then return 0 end
  local old = current_view()
  local number, id = old and old.number or -1, old and old.id or ''
  if number ~= proposal.expected_number or id ~= proposal.expected_id then return 0 end
  if proposal.number <= number_in('highest', -1) then return 0 end
  if call('HEXISTS', DEPARTED, proposal.proposer) == 1 then return 0 end
  local before = old and old.members or {}
  if proposal.kind == 'restore' then
    regain(proposal)
  elseif not grounds_hold(proposal, old, before) then
    return 0
  end
  install(proposal, before)
  return 1
end
