-- Names as far as Redis still knows them: an old snapshot may hold names that were deleted since.
-- -> ok, server run, names | restored

if restored then return {'restored'} end
return {'ok', server_run, redis.call('SMEMBERS', 'foundry:names')}
