{{/* Pod security "restricted", with nothing to write but what is mounted. */}}

{{- define "foundry.podSecurityContext" -}}
runAsNonRoot: true
{{- with .Values.global.podSecurity }}
{{- range $key := list "runAsUser" "runAsGroup" "fsGroup" }}
{{- with index $.Values.global.podSecurity $key }}
{{ $key }}: {{ int64 . }}
{{- end }}
{{- end }}
{{- if .fsGroup }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "foundry.containerSecurityContext" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
readOnlyRootFilesystem: true
runAsNonRoot: true
{{- end -}}
