{{/* Names, labels and images. */}}

{{- define "foundry.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $chart := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $chart) (contains $chart .Release.Name) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Of one component. Takes root and name. */}}
{{- define "foundry.name" -}}
{{ include "foundry.fullname" .root }}-{{ .name }}
{{- end -}}

{{/* What never changes in the life of a Deployment. Takes root and name. */}}
{{- define "foundry.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .name }}
{{- end -}}

{{/* Takes root and name. */}}
{{- define "foundry.labels" -}}
{{ include "foundry.selectorLabels" . }}
app.kubernetes.io/part-of: cartridge-foundry
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end -}}

{{/* Takes root, image and, maybe, variant: the end of the tag, unless the image has one of its own. */}}
{{- define "foundry.image" -}}
{{- $global := .root.Values.global.image -}}
{{- with $global.registry }}{{ . }}/{{ end -}}
{{- .image.repository -}}
{{- if .image.digest -}}
@{{ .image.digest }}
{{- else -}}
:{{ .image.tag | default (printf "%s%s" ($global.tag | default .root.Chart.AppVersion) (.variant | default "")) }}
{{- end -}}
{{- end -}}

{{/* That of a service; the rollout's has a variant for vLLM. Takes root and name. */}}
{{- define "foundry.serviceImage" -}}
{{- $values := index .root.Values .name -}}
{{- include "foundry.image" (dict "root" .root "image" $values.image "variant" (ternary "-vllm" "" (eq (dig "engine" "auto" $values.settings) "vllm"))) -}}
{{- end -}}

{{/* Takes root and name. */}}
{{- define "foundry.serviceAccountName" -}}
{{- $account := (index .root.Values .name).serviceAccount -}}
{{- $account.name | default (ternary (include "foundry.name" .) "default" $account.create) -}}
{{- end -}}

{{/* What each service has and needs; the order is that of the data. */}}
{{- define "foundry.services" -}}
gateway: {port: 8000, portName: http, store: true, model: false}
rollout: {port: 7001, portName: grpc, store: true, model: true}
teacher: {port: 7002, portName: grpc, store: false, model: true}
trainer: {port: 7003, portName: grpc, store: true, model: true}
{{- end -}}

{{/* Port of a URL or host:port. Takes url and default. */}}
{{- define "foundry.urlPort" -}}
{{ regexFind ":[0-9]+(/|$)" .url | trimAll ":/" | default .default }}
{{- end -}}
