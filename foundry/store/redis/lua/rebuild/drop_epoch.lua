-- Redis counts as emptied from now on.
-- -> ok

redis.call('DEL', 'foundry:epoch')
return {'ok'}
