-- name, version -> ok | missing
--@include pointers

if call('HEXISTS', key('versions', ARGV[1]), ARGV[2]) == 0 then return {'missing'} end
call('SADD', key('durable', ARGV[1]), ARGV[2])
return {'ok'}
