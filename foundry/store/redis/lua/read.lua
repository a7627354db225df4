-- command, arguments... -> ok, what the command answers

return {'ok', redis.call(unpack(ARGV))}
