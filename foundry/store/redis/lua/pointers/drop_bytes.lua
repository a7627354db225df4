-- For bytes found to be corrupt.
-- digest -> ok
--@include pointers

drop_bytes(ARGV[1])
return {'ok'}
