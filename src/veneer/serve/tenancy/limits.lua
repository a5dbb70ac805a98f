-- Reserves a request in all scopes or in none, or corrects a reservation; see redis_limits.py.
-- Keys share the hash tag {veneer}, so that they are on one node of a cluster.
local ask, clock = cjson.decode(ARGV[1]), redis.call('TIME')
if ask.changes then
  for _, a in ipairs(ask.changes) do
    if redis.call('HEXISTS', a[1], a[2]) == 1 then redis.call('HINCRBY', a[1], a[2], a[3]) end
  end
  return {}
end
local now, adds, base = clock[1] + clock[2] / 1000000, {}, '{veneer}:'
redis.call('SET', base .. 'begun', now, 'NX')
for i, scope in ipairs(ask.scopes) do
  if scope.concurrency then
    local key, running = base .. 'running:' .. scope.name, 0
    local counts = redis.call('HGETALL', key)
    for n = 1, #counts, 2 do
      if counts[n] == ask.server or redis.call('EXISTS', base .. 'server:' .. counts[n]) == 1 then
        running = running + counts[n + 1]
      else
        redis.call('HDEL', key, counts[n])
      end
    end
    if running >= scope.concurrency then return {i, 0, running, '1'} end
  end
  for j, w in ipairs(scope.windows) do
    local width = w.seconds / 60
    local key, used, slots = base .. w.seconds .. ':' .. w.unit .. ':' .. scope.name, 0, {}
    local found = redis.call('HGETALL', key)
    for n = 1, #found, 2 do
      local ends = (found[n] + 1) * width + w.seconds
      if ends <= now then
        redis.call('HDEL', key, found[n])
      else
        used = used + found[n + 1]
        slots[#slots + 1] = {ends, tonumber(found[n + 1])}
      end
    end
    local over = used + w.amount - w.maximum
    if over > 0 then
      table.sort(slots, function(a, b) return a[1] < b[1] end)
      for _, slot in ipairs(slots) do
        over = over - slot[2]
        if over <= 0 then return {i, j, used, tostring(slot[1] - now)} end
      end
      return {i, j, used, tostring(w.seconds)}
    end
    adds[#adds + 1] = {key, string.format('%d', math.floor(now / width)), w.amount, math.ceil(w.seconds + 2 * width)}
  end
end
for _, a in ipairs(adds) do
  redis.call('HINCRBY', a[1], a[2], a[3])
  redis.call('EXPIRE', a[1], a[4])
end
for _, scope in ipairs(ask.scopes) do
  if scope.concurrency then redis.call('HINCRBY', base .. 'running:' .. scope.name, ask.server, 1) end
end
return {0, tostring(now - redis.call('GET', base .. 'begun')), cjson.encode(adds)}
