-- id -> ok
--@include runs

drop(ARGV[1])
return {'ok'}
