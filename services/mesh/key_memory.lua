-- Remembers for a moment what the gateway said of a key, so that the next calls with it need not ask again.
--
-- A call of a key that is remembered gets the headers that the gateway's answer had, and an account of its own, and is
-- not asked about: it has REMEMBERED in its metadata, which clients can't set. Any other call is asked about as ever;
-- what the gateway says of it comes as metadata, and is learnt here if the gateway says for how long it holds.
--
-- Before this text come the namespaces of metadata NAMESPACE (what this filter says), ASKED (what it keeps of a call
-- until its answer) and ANSWER (what the gateway says); the names REMEMBERED, REMEMBER (for how many milliseconds) and
-- ACCOUNT; HEADERS, as what the answer adds begins; GATEWAYS, as the accounts of those begin that can be told of a call;
-- MARK, as the rest of an account's id begins that is made here; MOST (keys) and MOST_MS. Each of Envoy's threads has a
-- memory of its own.

-- Two generations, so that nothing need be looked for to be forgotten: when the young one is full or has become old, it
-- takes the place of the old one.
local young, old, count, since = {}, {}, 0, 0

local function find(key, now)
  local known = young[key] or old[key]
  -- A clock that was set back makes nobody's time longer.
  if known and known.from <= now and now < known.till then return known end
  return nil
end

local function keep(key, known, now)
  if count >= MOST or now >= since + MOST_MS or now < since then
    old, young, count, since = young, {}, 0, now
  end
  if not young[key] then count = count + 1 end
  young[key] = known
end

function envoy_on_request(handle)
  local headers = handle:headers()
  if headers:getNumValues("authorization") ~= 1 then return end
  local key, now = headers:get("authorization"), handle:timestamp()
  local known, request = find(key, now), headers:get("x-request-id")
  local metadata = handle:streamInfo():dynamicMetadata()
  if not known or not request then
    metadata:set(ASKED, "key", key)
    metadata:set(ASKED, "at", now)
    return
  end
  for name, value in pairs(known.headers) do headers:replace(name, value) end
  headers:replace(ACCOUNT, known.account .. request)
  headers:remove("authorization")
  -- Last: whatever fails before it leaves the call to be asked about.
  metadata:set(NAMESPACE, REMEMBERED, true)
end

function envoy_on_response(handle)
  local metadata = handle:streamInfo():dynamicMetadata()
  local asked = metadata:get(ASKED)
  if not asked then return end
  -- What is logged of a call has its metadata, too: the key itself is nobody's business there.
  metadata:set(ASKED, "key", "")
  local said = metadata:get(ANSWER)
  local span = said and tonumber(said[REMEMBER])
  if not span then return end
  local gateway = (said[ACCOUNT] or ""):match("^(.*%.)[^.]*$")
  -- The time counts from when it was asked: the gateway can't have known anything later.
  local from, till = asked.at, asked.at + math.min(span, MOST_MS)
  local now = handle:timestamp()
  if not GATEWAYS[gateway or ""] or till <= now then return end
  local headers = {}
  for name, value in pairs(said) do
    if name:sub(1, #HEADERS) == HEADERS and name ~= ACCOUNT then headers[name] = value end
  end
  keep(asked.key, {headers = headers, account = gateway .. MARK, from = from, till = till}, now)
end
