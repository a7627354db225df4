-- -> ok, server run | restored

if restored then return {'restored'} end
return {'ok', server_run}
