-- id, attempt -> ok | fenced, attempt, state | missing
--@include runs

return fence(ARGV[1], ARGV[2]) or {'ok'}
