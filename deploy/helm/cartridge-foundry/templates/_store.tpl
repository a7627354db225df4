{{/* Where the store is, and the files that its settings name. */}}

{{- define "foundry.redis.name" -}}
{{ include "foundry.name" (dict "root" . "name" "redis") }}
{{- end -}}

{{- define "foundry.redis.secretName" -}}
{{ .Values.redis.auth.existingSecret | default (include "foundry.redis.name" .) }}
{{- end -}}

{{/* "true" if Redis asks for a password. */}}
{{- define "foundry.redis.hasPassword" -}}
{{- with .Values.redis }}{{ if or .bundled.enabled .auth.existingSecret .auth.password }}true{{ end }}{{ end -}}
{{- end -}}

{{- define "foundry.objects.name" -}}
{{ include "foundry.name" (dict "root" . "name" "objects") }}
{{- end -}}

{{- define "foundry.objects.secretName" -}}
{{ .Values.objects.auth.existingSecret | default (include "foundry.objects.name" .) }}
{{- end -}}

{{/* "true" if object storage asks for a key. */}}
{{- define "foundry.objects.hasKey" -}}
{{- with .Values.objects }}{{ if or .bundled.enabled .auth.existingSecret .auth.accessKeyId }}true{{ end }}{{ end -}}
{{- end -}}

{{- define "foundry.objects.claimName" -}}
{{ .Values.objects.claim.existingClaim | default (include "foundry.objects.name" .) }}
{{- end -}}

{{- define "foundry.store.signingSecretName" -}}
{{ .Values.store.signing.existingSecret | default (include "foundry.name" (dict "root" . "name" "signing")) }}
{{- end -}}

{{/* StoreSettings, as far as the chart decides them. */}}
{{- define "foundry.store.settings" -}}
{{- $redis := .Values.redis -}}
{{- $objects := .Values.objects -}}
redis_url: {{ ternary (printf "redis://%s:6379/0" (include "foundry.redis.name" .)) $redis.url $redis.bundled.enabled }}
{{- with $redis.username }}
redis_username: {{ . | quote }}
{{- end }}
{{- if include "foundry.redis.hasPassword" . }}
redis_password_file: /run/secrets/foundry/redis/password
{{- end }}
{{- if $redis.tls.existingSecret }}
{{- with $redis.tls.caKey }}
redis_ca_file: /run/secrets/foundry/redis-tls/{{ . }}
{{- end }}
{{- with $redis.tls.certificateKey }}
redis_certificate_file: /run/secrets/foundry/redis-tls/{{ . }}
{{- end }}
{{- with $redis.tls.keyKey }}
redis_key_file: /run/secrets/foundry/redis-tls/{{ . }}
{{- end }}
{{- end }}
{{- if $objects.bundled.enabled }}
objects_url: s3://{{ $objects.bundled.bucket }}
objects_endpoint: http://{{ include "foundry.objects.name" . }}:8333
objects_region: us-east-1
objects_allow_http: true
{{- else if $objects.claim.enabled }}
objects_url: file:///objects
{{- else }}
objects_url: {{ $objects.url }}
{{- with $objects.endpoint }}
objects_endpoint: {{ . }}
{{- end }}
{{- with $objects.region }}
objects_region: {{ . }}
{{- end }}
{{- if $objects.allowHttp }}
objects_allow_http: true
{{- end }}
{{- if $objects.tls.existingSecret }}
objects_ca_file: /run/secrets/foundry/objects-tls/{{ $objects.tls.caKey }}
{{- end }}
{{- end }}
{{- if include "foundry.objects.hasKey" . }}
objects_access_key_id_file: /run/secrets/foundry/objects/access-key-id
objects_secret_access_key_file: /run/secrets/foundry/objects/secret-access-key
{{- if $objects.auth.sessionTokenKey }}
objects_session_token_file: /run/secrets/foundry/objects/session-token
{{- end }}
{{- end }}
{{- if .Values.store.signing.enabled }}
signing_key_file: /run/secrets/foundry/signing/keys
{{- end }}
{{- end -}}

{{/* Volumes and their mount paths: the settings above name the files. */}}
{{- define "foundry.store.volumes" -}}
{{- $redis := .Values.redis -}}
{{- $objects := .Values.objects -}}
{{- if include "foundry.redis.hasPassword" . }}
- name: redis-auth
  secret:
    secretName: {{ include "foundry.redis.secretName" . }}
    items: [{key: {{ $redis.auth.passwordKey }}, path: password}]
{{- end }}
{{- with $redis.tls.existingSecret }}
- name: redis-tls
  secret: {secretName: {{ . }}}
{{- end }}
{{- if include "foundry.objects.hasKey" . }}
- name: objects-auth
  secret:
    secretName: {{ include "foundry.objects.secretName" . }}
    items:
      - {key: {{ $objects.auth.accessKeyIdKey }}, path: access-key-id}
      - {key: {{ $objects.auth.secretAccessKeyKey }}, path: secret-access-key}
      {{- with $objects.auth.sessionTokenKey }}
      - {key: {{ . }}, path: session-token}
      {{- end }}
{{- end }}
{{- with $objects.tls.existingSecret }}
- name: objects-tls
  secret: {secretName: {{ . }}}
{{- end }}
{{- with $objects.gcs.existingSecret }}
- name: gcs
  secret: {secretName: {{ . }}}
{{- end }}
{{- if .Values.store.signing.enabled }}
- name: signing
  secret:
    secretName: {{ include "foundry.store.signingSecretName" . }}
    items: [{key: keys, path: keys}]
{{- end }}
{{- if $objects.claim.enabled }}
- name: objects
  persistentVolumeClaim: {claimName: {{ include "foundry.objects.claimName" . }}}
{{- end }}
{{- end -}}

{{- define "foundry.store.volumeMounts" -}}
{{- $redis := .Values.redis -}}
{{- $objects := .Values.objects -}}
{{- if include "foundry.redis.hasPassword" . }}
- {name: redis-auth, mountPath: /run/secrets/foundry/redis, readOnly: true}
{{- end }}
{{- if $redis.tls.existingSecret }}
- {name: redis-tls, mountPath: /run/secrets/foundry/redis-tls, readOnly: true}
{{- end }}
{{- if include "foundry.objects.hasKey" . }}
- {name: objects-auth, mountPath: /run/secrets/foundry/objects, readOnly: true}
{{- end }}
{{- if $objects.tls.existingSecret }}
- {name: objects-tls, mountPath: /run/secrets/foundry/objects-tls, readOnly: true}
{{- end }}
{{- if $objects.gcs.existingSecret }}
- {name: gcs, mountPath: /run/secrets/foundry/gcs, readOnly: true}
{{- end }}
{{- if .Values.store.signing.enabled }}
- {name: signing, mountPath: /run/secrets/foundry/signing, readOnly: true}
{{- end }}
{{- if $objects.claim.enabled }}
- {name: objects, mountPath: /objects}
{{- end }}
{{- end -}}
