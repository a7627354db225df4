{{/* The Secret with the tokens of all roles, each under its role's name. Takes the root. */}}
{{- define "foundry.rpc.secretName" -}}
{{ .Values.rpc.tokens.existingSecret | default (include "foundry.name" (dict "root" . "name" "rpc")) }}
{{- end -}}

{{/* Who calls holds its own role's token, who is called all of them. Takes name. */}}
{{- define "foundry.rpc.roles" -}}
{{ ternary .name "gateway trainer operator" (has .name (list "gateway" "trainer")) }}
{{- end -}}
