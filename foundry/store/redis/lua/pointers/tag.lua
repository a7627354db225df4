-- Only durable versions are tagged.
-- name, tag, version, longest history -> ok, version before or '' | missing
--@include tags

if call('SISMEMBER', key('durable', name), ARGV[3]) == 0 then return {'missing'} end
if meant == ARGV[3] then return {'ok', meant} end
local older = history()
if meant then table.insert(older, 1, meant) end
move(ARGV[3], older, ARGV[4])
return {'ok', meant or ''}
