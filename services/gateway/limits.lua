-- Limits that gateways share, one round trip a decision. KEYS: a key's buckets (hash), its running requests (hash by
-- gateway), and the gateways that are alive (sorted set by the time of their last sign). Time is the server's own.
--   admit   rpm tpm concurrency cost              -> allowed, which limit, wait in ms, requests left, tokens left, fresh
--   settle  rpm tpm tokens                        -> 1; gives tokens back (takes them where negative), ends a request
--   restore rpm tpm requests tokens busy kept     -> 1; what a gateway did while it could not say so here
--   hello                                         -> gateways alive
-- A limit of -1 is none. The first two arguments are the gateway and the command.
local MINUTE, ALIVE, KEEP = 60000000, 10000000, 600
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local gateway, command = ARGV[1], ARGV[2]

if command == 'hello' then
  redis.call('ZADD', KEYS[3], now, gateway)
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - 6 * ALIVE)
  return redis.call('ZCOUNT', KEYS[3], now - ALIVE, '+inf')
end

local rpm, tpm = tonumber(ARGV[3]), tonumber(ARGV[4])
local state = redis.call('HMGET', KEYS[1], 'r', 't', 'at')
local fresh = not state[3]
local passed = fresh and 0 or math.max(0, now - state[3])

local function level(kept, capacity)
  if capacity < 0 then return 0 end
  return math.min(capacity, (tonumber(kept) or capacity) + passed * capacity / MINUTE)
end

local requests, tokens = level(state[1], rpm), level(state[2], tpm)

local function save()
  redis.call('HSET', KEYS[1], 'r', string.format('%.6f', requests), 't', string.format('%.6f', tokens),
    'at', string.format('%.0f', now))
  -- A debt is kept until it is paid.
  local debt = tpm > 0 and math.ceil(math.max(0, -tokens) * 60 / tpm) or 0
  redis.call('EXPIRE', KEYS[1], KEEP + debt)
end

local function add_busy(change)
  if redis.call('HINCRBY', KEYS[2], gateway, change) <= 0 then redis.call('HDEL', KEYS[2], gateway) end
  redis.call('EXPIRE', KEYS[2], 86400)
end

local function busy()
  local total, counts = 0, redis.call('HGETALL', KEYS[2])
  for i = 1, #counts, 2 do
    local seen = redis.call('ZSCORE', KEYS[3], counts[i])
    if counts[i] == gateway or (seen and now - seen < ALIVE) then
      total = total + counts[i + 1]
    end
  end
  return total
end

if command == 'admit' then
  local concurrency, cost = tonumber(ARGV[5]), tonumber(ARGV[6])
  local which, wait = '', 0
  local function refuse(name, ms)
    if ms > wait then which, wait = name, ms end
  end
  if rpm >= 0 and requests < 1 then refuse('requests', (1 - requests) * 60000 / rpm) end
  if tpm >= 0 then
    cost = math.min(cost, tpm)
    if tokens < cost then refuse('tokens', (cost - tokens) * 60000 / tpm) end
  end
  if concurrency >= 0 and busy() >= concurrency then refuse('concurrency', 1000) end
  local allowed = which == '' and 1 or 0
  if allowed == 1 then
    requests = requests - 1
    tokens = tokens - cost
    save()
    if concurrency >= 0 then add_busy(1) end
  end
  return {allowed, which, math.ceil(wait), tostring(requests), tostring(tokens), fresh and 1 or 0}
end

if command == 'settle' then
  tokens = math.min(math.max(tpm, 0), tokens + tonumber(ARGV[5]))
  save()
  if ARGV[6] == '1' then add_busy(-1) end
  return 1
end

-- restore: where the buckets were kept, what was used meanwhile comes off; where they were lost, what is known is set.
if ARGV[8] == '1' and not fresh then
  requests, tokens = requests - tonumber(ARGV[9]), tokens - tonumber(ARGV[10])
else
  requests, tokens = math.min(requests, tonumber(ARGV[5])), math.min(tokens, tonumber(ARGV[6]))
end
save()
redis.call('HDEL', KEYS[2], gateway)
if tonumber(ARGV[7]) > 0 then add_busy(tonumber(ARGV[7])) end
return 1
