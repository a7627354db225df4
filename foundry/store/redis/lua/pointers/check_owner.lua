-- name, run, attempt -> ok | fenced, run or '', attempt or ''
--@include pointers

return fence(ARGV[1], ARGV[2], ARGV[3]) or {'ok'}
