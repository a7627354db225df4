-- cursor -> ok, next cursor, keys of another type than theirs
--@include types

local cursor, page = scan(ARGV[1])
local wrong = {}
for _, each in ipairs(page) do
  if of_wrong_type(each) then table.insert(wrong, each) end
end
return {'ok', cursor, wrong}
