{{/* The Secret with the operator's own API key, under `api-key`. Takes the root. */}}
{{- define "foundry.gateway.keySecretName" -}}
{{ .Values.gateway.apiKeys.existingSecret | default (include "foundry.name" (dict "root" . "name" "api-key")) }}
{{- end -}}

{{/* That key as a volume. Takes the root. */}}
{{- define "foundry.gateway.keyVolume" -}}
- name: api-key
  secret:
    secretName: {{ include "foundry.gateway.keySecretName" . }}
    items: [{key: api-key, path: api-key}]
{{- end -}}
