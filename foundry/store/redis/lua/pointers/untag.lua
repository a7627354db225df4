-- name, tag -> ok | missing
--@include pointers

if call('HDEL', key('tags', ARGV[1]), ARGV[2]) == 0 then return {'missing'} end
call('HDEL', key('tag-history', ARGV[1]), ARGV[2])
return {'ok'}
