-- Gives the errors of the REST bridge the mesh's one body: {"error": {"message", "type", "param", "code"}}.
--
-- The transcoder answers an error with google.rpc.Status as JSON, and the endpoint picker with plain text and its reason
-- beside it. REASONS (reason -> HTTP status, type, code), REASON_OF_CODE (gRPC code -> reason) and REASON_HEADER come
-- before this text.

local INTERNAL = "INTERNAL"
local ESCAPES = {['"'] = '\\"', ["\\"] = "\\\\", ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t"}

local function quote(text)
  return '"' .. text:gsub('[%c"\\]', function(c) return ESCAPES[c] or string.format("\\u%04x", c:byte()) end) .. '"'
end

-- The JSON string that begins at `from`, its quotes included and its escapes as they are, and where it ends.
local function string_at(json, from)
  local at = from + 1
  while true do
    local found = json:find('["\\]', at)
    if not found then return nil end
    if json:sub(found, found) == '"' then return json:sub(from, found), found end
    at = found + 2
  end
end

-- The value of the first string field of this name after `from`. A name inside a string has its quotes escaped, so it
-- is never taken for a field.
local function field(json, name, from)
  local _, last = json:find('"' .. name .. '":"', from, true)
  if not last then return nil end
  return string_at(json, last)
end

local function body_of(message, param, row, code)
  return '{"error":{"message":' .. message .. ',"type":' .. quote(row.type) .. ',"param":' .. (param or "null")
    .. ',"code":' .. (code or quote(row.code)) .. "}}"
end

local function unquote(text)
  return text and text:sub(2, -2)
end

-- The body, the row and the seconds to wait, of google.rpc.Status as the transcoder prints it: code, message, details.
local function from_status(json)
  local number = tonumber(json:match('^{"code":(%d+)'))
  if not number then return nil end
  local message, details = '""', 1
  local _, start = json:find('^{"code":%d+,"message":')
  if start then message, details = string_at(json, start + 1) end
  local reason = unquote(field(json, "reason", details)) or REASON_OF_CODE[number]
  local row = REASONS[reason or INTERNAL] or REASONS[INTERNAL]
  local wait = json:match('"retry_delay":"([%d.]+)s"', details)
  return body_of(message, field(json, "field", details), row, field(json, "code", details)), row, tonumber(wait)
end

local function from_text(text, reason)
  local row = REASONS[(reason or INTERNAL):upper()] or REASONS[INTERNAL]
  return body_of(quote(text), nil, row, nil), row, nil
end

local function read(handle)
  local body = handle:body(true)
  return body:getBytes(0, body:length())
end

function envoy_on_response(handle)
  local headers = handle:headers()
  local status = tonumber(headers:get(":status"))
  headers:remove("grpc-status")
  headers:remove("grpc-message")
  headers:remove("grpc-accept-encoding")
  headers:remove("grpc-status-details-bin")
  local reason = headers:get(REASON_HEADER)
  headers:remove(REASON_HEADER)
  if status < 400 then return end
  local text = read(handle)
  if text:sub(1, 9) == '{"error":' or text:sub(1, 10) == '{"error": ' then return end
  local body, row, wait = from_status(text)
  if not body then body, row, wait = from_text(text, reason) end
  -- What was got before the body was awaited is no longer valid.
  headers = handle:headers()
  headers:replace(":status", tostring(row.http))
  headers:replace("content-type", "application/json")
  if wait then headers:replace("retry-after", tostring(math.ceil(wait))) end
  handle:body(true):setBytes(body)
end
