-- Before the pointers are restored: an old snapshot may hold runs that were deleted since.
-- token, JSON {id: true} of the runs there are -> ok | over
--@include runs
--@include restoring

local kept = cjson.decode(ARGV[2])
for _, id in ipairs(call('ZRANGE', 'foundry:runs', 0, -1)) do
  if not kept[id] then drop(id) end
end
return {'ok'}
