-- digest... -> ok
--@include pointers

for i = 1, #ARGV do call('DEL', key('condemned', ARGV[i])) end
return {'ok'}
