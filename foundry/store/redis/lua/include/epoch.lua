-- Which life of the server this is: `server_run`; and whether pointers were restored in it: `restored`.
-- Redis hands scripts nothing else that tells one life of a server from the next.

local server_run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
local restored = redis.pcall('GET', 'foundry:epoch') == server_run
