-- token -> ok: it is restored, by us or by another | over

if restored then return {'ok'} end
--@include restoring
redis.call('SET', 'foundry:epoch', server_run)
return {'ok'}
