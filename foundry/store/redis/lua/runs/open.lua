-- tenant -> ok, how many of its runs are not over
--@include runs

return {'ok', num_open(ARGV[1])}
