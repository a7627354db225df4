-- What all other includes begin with.

local call = redis.call
local function key(kind, id) return 'foundry:' .. kind .. ':' .. id end
-- A count as we write it, or nil.
local function number(text)
  return text and #text <= 16 and string.match(text, '^%d+$') and tonumber(text) or nil
end
local function now_ms() local t = call('TIME') return t[1] * 1000 + math.floor(t[2] / 1000) end
