{{- define "foundry.redis.configuration" -}}
valkey.conf: |
  bind * -::*
  port 6379
  # The user without a password may only PING.
  protected-mode no
  aclfile /run/valkey/users.acl
  dir /data
  appendonly {{ ternary "yes" "no" .Values.redis.bundled.persistence.enabled }}
  save ""
  maxmemory {{ .Values.redis.bundled.maxmemory }}
  maxmemory-policy noeviction
start.sh: |
  set -eu
  umask 077
  # The password as its hash: any character may be in it.
  hash=$(printf %s "$(cat /run/secrets/foundry/redis/password)" | sha256sum | cut -c1-64)
  {
    echo "user default on nopass resetkeys resetchannels -@all +ping"
    echo "user {{ .Values.redis.username }} on #$hash {{ include "foundry.redis.rights" . }}"
  } > /run/valkey/users.acl
  exec valkey-server /etc/valkey/valkey.conf
{{- end -}}
