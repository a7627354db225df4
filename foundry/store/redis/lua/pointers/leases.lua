-- digest -> ok, holders
--@include pointers

leased(ARGV[1])
return {'ok', call('ZRANGE', key('leases', ARGV[1]), 0, -1)}
