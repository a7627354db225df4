{{/* Takes size, storageClassName and accessModes. */}}
{{- define "foundry.claimSpec" -}}
accessModes:
  {{- toYaml .accessModes | nindent 2 }}
{{- with .storageClassName }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests: {storage: {{ .size }}}
{{- end -}}

{{/* A claim that outlives the release. Takes root, name and claim. */}}
{{- define "foundry.claim" -}}
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ include "foundry.name" . }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "foundry.labels" . | nindent 4 }}
  annotations:
    helm.sh/resource-policy: keep
spec:
  {{- include "foundry.claimSpec" .claim | nindent 2 }}
{{- end -}}
