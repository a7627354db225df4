{{/* Secret with the certificate of a service. Takes root and name. */}}
{{- define "foundry.tls.secretName" -}}
{{- $tls := .root.Values.tls -}}
{{- if $tls.certManager.enabled -}}
{{ include "foundry.name" . }}-tls
{{- else -}}
{{ required (printf "tls.existingSecrets.%s: name a Secret, or enable tls.certManager" .name) (index $tls.existingSecrets .name) }}
{{- end -}}
{{- end -}}
