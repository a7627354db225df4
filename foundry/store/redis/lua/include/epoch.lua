-- Which life of the server this is: `server_run`; and whether pointers were restored in it: `restored`.
-- Redis hands scripts nothing else that tells one life of a server from the next. A server that was emptied in the same
-- life has no epoch.

local server_run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
local epoch = redis.pcall('GET', 'foundry:epoch')
local restored = epoch == server_run
