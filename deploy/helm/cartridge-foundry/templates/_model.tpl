{{/* The frozen model at /model. */}}

{{- define "foundry.model.name" -}}
{{- $model := .Values.model -}}
{{- $model.name | default $model.hub.id | default (base $model.image.repository) -}}
{{- end -}}

{{/* How the model comes: claim, hostPath, cache (one claim that a Job fills) or copy (of the image, in each pod). */}}
{{- define "foundry.model.source" -}}
{{- with .Values.model -}}
{{- if .existingClaim }}claim{{ else if .hostPath }}hostPath{{ else if or .hub.id .cache.enabled }}cache{{ else }}copy{{ end -}}
{{- end -}}
{{- end -}}

{{/* Folder in the cache claim: another model is another folder, so that running pods keep theirs. */}}
{{- define "foundry.model.folder" -}}
{{- with .Values.model -}}
{{- $source := ternary (printf "%s@%s" .hub.id .hub.revision) (include "foundry.image" (dict "root" $ "image" .image)) (ne .hub.id "") -}}
model-{{ sha256sum $source | trunc 16 }}
{{- end -}}
{{- end -}}

{{- define "foundry.model.claimName" -}}
{{- with .Values.model -}}
{{- if .existingClaim }}{{ .existingClaim }}{{ else }}{{ .cache.existingClaim | default (include "foundry.name" (dict "root" $ "name" "model")) }}{{ end -}}
{{- end -}}
{{- end -}}

{{- define "foundry.model.volume" -}}
{{- $source := include "foundry.model.source" . -}}
- name: model
  {{- if eq $source "hostPath" }}
  hostPath: {path: {{ .Values.model.hostPath }}, type: Directory}
  {{- else if eq $source "copy" }}
  emptyDir: {sizeLimit: {{ .Values.model.image.sizeLimit }}}
  {{- else }}
  persistentVolumeClaim: {claimName: {{ include "foundry.model.claimName" . }}, readOnly: {{ eq $source "claim" }}}
  {{- end }}
{{- end -}}

{{- define "foundry.model.volumeMount" -}}
{{- $source := include "foundry.model.source" . -}}
- name: model
  mountPath: /model
  readOnly: true
  {{- if eq $source "cache" }}
  subPath: {{ include "foundry.model.folder" . }}
  {{- else if and (eq $source "claim") .Values.model.subPath }}
  subPath: {{ .Values.model.subPath }}
  {{- end }}
{{- end -}}

{{/* Copies the model out of its image. Takes root and directory. */}}
{{- define "foundry.model.copyContainer" -}}
name: copy-model
image: {{ include "foundry.image" (dict "root" .root "image" .root.Values.model.image) }}
imagePullPolicy: {{ .root.Values.global.image.pullPolicy }}
command: [cp, -r, /model/., {{ .directory }}]
securityContext:
  {{- include "foundry.containerSecurityContext" .root | nindent 2 }}
resources:
  requests: {cpu: 100m, memory: 64Mi}
  limits: {memory: 512Mi}
volumeMounts:
  - {name: model, mountPath: {{ ternary "/cache" .directory (hasPrefix "/cache" .directory) }}}
{{- end -}}

{{/* Before a service that needs the model. Takes root and name. */}}
{{- define "foundry.model.initContainer" -}}
{{- $source := include "foundry.model.source" .root -}}
{{- if eq $source "copy" }}
- {{ include "foundry.model.copyContainer" (dict "root" .root "directory" "/copy") | nindent 2 | trim }}
{{- else if eq $source "cache" }}
- name: wait-for-model
  image: {{ include "foundry.serviceImage" . }}
  imagePullPolicy: {{ .root.Values.global.image.pullPolicy }}
  command: [python, -c]
  args:
    - {{ .root.Files.Get "files/wait_for_model.py" | quote }}
    - /cache/{{ include "foundry.model.folder" .root }}
  securityContext:
    {{- include "foundry.containerSecurityContext" .root | nindent 4 }}
  resources:
    requests: {cpu: 10m, memory: 32Mi}
    limits: {memory: 128Mi}
  volumeMounts:
    - {name: model, mountPath: /cache, readOnly: true}
{{- end }}
{{- end -}}
