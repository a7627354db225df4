-- name, keep_hot, dry 0|1: say what it would do, change nothing
-- -> ok, [version, digest, bytes in Redis, versions that share them] ...
--@include hot_share

local name, gone = ARGV[1], {}
for _, each in ipairs(trimmable(name, tonumber(ARGV[2]))) do
  local version, value = each[1], each[2]
  table.insert(gone, hot_share(name, version, digest_of(value)))
  if ARGV[3] ~= '1' then drop_version(name, version, value) end
end
return {'ok', gone}
