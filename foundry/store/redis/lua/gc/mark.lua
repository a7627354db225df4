-- Mark blobs for deletion: neither reserved nor leased while the mark stands.
-- ms that the marks stand (0: dry), digest...
-- -> ok, for each: '' (marked) | leased | reserved | versions that have it in Redis
--@include pointers

local reserved, answers = {}, {}
for _, name in ipairs(call('SMEMBERS', 'foundry:reserving')) do
  local pending = call('HVALS', key('pending', name))
  for _, each in ipairs(pending) do reserved[string.match(each, '(%S+) %d$') or ''] = true end
  if #pending == 0 and ARGV[1] ~= '0' then call('SREM', 'foundry:reserving', name) end
end
for i = 2, #ARGV do
  local digest, answer = ARGV[i], ''
  if leased(digest) then
    answer = 'leased'
  elseif reserved[digest] then
    answer = 'reserved'
  else
    answer = table.concat(call('SMEMBERS', key('refs', digest)), ' ')
  end
  if answer == '' and ARGV[1] ~= '0' then call('SET', key('condemned', digest), '1', 'PX', ARGV[1]) end
  table.insert(answers, answer)
end
return {'ok', answers}
