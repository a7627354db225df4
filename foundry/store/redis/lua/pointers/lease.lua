-- digest, holder, ms -> ok | marked
--@include pointers

if call('EXISTS', key('condemned', ARGV[1])) == 1 then return {'marked'} end
local leases = key('leases', ARGV[1])
leased(ARGV[1])
call('ZADD', leases, 'GT', now_ms() + tonumber(ARGV[3]), ARGV[2])
call('PEXPIREAT', leases, string.format('%d', call('ZRANGE', leases, -1, -1, 'WITHSCORES')[2]))
return {'ok'}
