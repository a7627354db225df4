-- name, tag -> ok, version, history | missing
--@include tags

if not meant then return {'missing'} end
return {'ok', meant, call('HGET', key('tag-history', name), tag) or '0'}
