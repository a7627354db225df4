-- Versions that were deleted since are passed over.
-- name, tag, longest history -> ok, version, version before | missing | first, version
--@include tags

if not meant then return {'missing'} end
local older = history()
while #older > 0 do
  local version = table.remove(older, 1)
  if version ~= meant and call('SISMEMBER', key('durable', name), version) == 1 then
    move(version, older, ARGV[3])
    return {'ok', version, meant}
  end
end
return {'first', meant}
