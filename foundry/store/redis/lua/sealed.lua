-- What every script is sent in: arguments and reply carry a checksum.
-- the script's arguments, one that makes the call unique, the checksum of all these
-- -> the script's reply, checksum over the call's checksum and the reply | damaged

-- Items become text one by one, as `_text` in connection.py has it.
local function text(item)
  if type(item) == 'table' then
    local items = {}
    for i = 1, #item do
      -- Where a reply ends to Redis.
      if item[i] == nil then break end
      items[i] = text(item[i])
    end
    return '[' .. table.concat(items, ',') .. ']'
  end
  if type(item) == 'number' then return string.format('%d', item) end
  return item and #item .. ':' .. item or '-'
end

local sum = table.remove(ARGV)
if redis.sha1hex(text(ARGV)) ~= sum then return {'damaged'} end
table.remove(ARGV)

local function script()
--@script
end

local reply = script()
return {reply, redis.sha1hex(sum .. text(reply))}
