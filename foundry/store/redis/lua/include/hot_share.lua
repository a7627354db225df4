-- What scripts that report what leaves Redis share.
--@include pointers

-- What a version has in Redis: digest, bytes, versions that share them; no bytes if none are kept for it.
local function hot_share(name, version, digest)
  local num_bytes, refs = 0, key('refs', digest)
  if call('SISMEMBER', refs, name .. '@' .. version) == 1 then
    for _, chunk in ipairs(keys_of_bytes(digest)) do num_bytes = num_bytes + call('STRLEN', chunk) end
  end
  return {version, digest, string.format('%d', num_bytes), call('SCARD', refs)}
end
