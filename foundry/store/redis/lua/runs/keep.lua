-- Before the pointers are restored: an old snapshot may hold runs that were deleted since.
-- server run, JSON {id: true} of the runs there are -> ok | over
--@include runs

if restored or server_run ~= ARGV[1] then return {'over'} end
local kept = cjson.decode(ARGV[2])
for _, id in ipairs(call('ZRANGE', 'foundry:runs', 0, -1)) do
  if not kept[id] then drop(id) end
end
return {'ok'}
