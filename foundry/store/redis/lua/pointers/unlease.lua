-- digest, holder -> ok
--@include pointers

call('ZREM', key('leases', ARGV[1]), ARGV[2])
return {'ok'}
