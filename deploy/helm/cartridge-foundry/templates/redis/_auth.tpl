{{/* The rights of the services' user: those of docs/store.md. */}}
{{- define "foundry.redis.rights" -}}
resetchannels ~foundry:* -@all +client|setinfo +select +evalsha +script|load +info +time +exists +get +set +incrby +strlen +scan +del +unlink +expire +pexpireat +pttl +persist +rename +hget +hmget +hgetall +hkeys +hvals +hexists +hset +hsetnx +hdel +hincrby +sadd +srem +scard +sismember +smembers +zadd +zrem +zcard +zscore +zrange +zrevrange +zrangebyscore +zpopmin +zremrangebyscore +rpush +ltrim +blpop +xadd +xread +xrevrange
{{- end -}}
