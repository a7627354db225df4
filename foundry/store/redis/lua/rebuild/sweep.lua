-- Keys of another type than theirs go: nothing could be restored there. And names as far as Redis still knows them: an
-- old snapshot may hold names that were deleted since.
-- token, cursor -> ok, next cursor, keys that went, names | over
--@include types
--@include restoring

local cursor, page = scan(ARGV[2])
local gone, names = {}, {}
for _, each in ipairs(page) do
  table.insert(names, each:match('^foundry:name:(.*)$'))
  if of_wrong_type(each) then
    call('UNLINK', each)
    table.insert(gone, each)
  end
end
return {'ok', cursor, gone, names}
