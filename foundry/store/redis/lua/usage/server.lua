-- -> ok, bytes used, most bytes (0: no limit), queued runs, held runs

local memory = redis.call('INFO', 'memory')
return {'ok', string.match(memory, 'used_memory:(%d+)'), string.match(memory, 'maxmemory:(%d+)'),
        redis.call('ZCARD', 'foundry:runs:queue'), redis.call('ZCARD', 'foundry:runs:leases')}
