-- token, number of chunks -> ok
--@include pointers

for i = 0, tonumber(ARGV[2]) - 1 do call('UNLINK', key('staged', ARGV[1]) .. ':' .. i) end
return {'ok'}
