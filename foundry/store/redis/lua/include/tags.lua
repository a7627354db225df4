-- What scripts that read or move a tag share. ARGV begins with name, tag; `meant` is the version that the tag means, or
-- false.
--@include pointers

local name, tag = ARGV[1], ARGV[2]
local meant = call('HGET', key('tags', name), tag)

-- The versions that the tag meant before, newest first.
local function history()
  local older = {}
  for word in string.gmatch(call('HGET', key('tag-history', name), tag) or '', '%d+') do table.insert(older, word) end
  table.remove(older, 1)
  return older
end

-- Keeps at most `most` versions in the history.
local function move(version, older, most)
  while #older > tonumber(most) do table.remove(older) end
  call('HSET', key('tags', name), tag, version)
  table.insert(older, 1, string.format('%d', now_ms()))
  call('HSET', key('tag-history', name), tag, table.concat(older, ' '))
end
