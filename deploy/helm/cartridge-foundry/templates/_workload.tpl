{{/* What every service is made of. Each takes root and name. */}}

{{- define "foundry.deployment" -}}
{{- $values := index .root.Values .name -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "foundry.name" . }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "foundry.labels" . | nindent 4 }}
spec:
  {{- if not (or (dig "autoscaling" "enabled" false $values) (dig "keda" "enabled" false $values)) }}
  replicas: {{ $values.replicas }}
  {{- end }}
  strategy:
    type: RollingUpdate
    rollingUpdate: {maxUnavailable: 0, maxSurge: 1}
  selector:
    matchLabels:
      {{- include "foundry.selectorLabels" . | nindent 6 }}
  template:
    {{- include "foundry.podTemplate" . | nindent 4 }}
{{- end -}}

{{/* Headless: clients resolve every address, and balance themselves. */}}
{{- define "foundry.headlessService" -}}
{{- $port := (index (include "foundry.services" .root | fromYaml) .name).port -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "foundry.name" . }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "foundry.labels" . | nindent 4 }}
spec:
  clusterIP: None
  publishNotReadyAddresses: false
  selector:
    {{- include "foundry.selectorLabels" . | nindent 4 }}
  ports:
    - {name: grpc, port: {{ $port }}, targetPort: grpc, protocol: TCP}
{{- end -}}

{{- define "foundry.serviceAccount" -}}
{{- with (index .root.Values .name).serviceAccount }}
{{- if .create }}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ include "foundry.serviceAccountName" $ }}
  namespace: {{ $.root.Release.Namespace }}
  labels:
    {{- include "foundry.labels" $ | nindent 4 }}
  {{- with .annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
{{- end }}
{{- end }}
{{- end -}}

{{- define "foundry.podDisruptionBudget" -}}
{{- with (index .root.Values .name).podDisruptionBudget }}
{{- if .enabled }}
apiVersion: {{ ternary "policy/v1" "policy/v1beta1" (semverCompare ">=1.21-0" $.root.Capabilities.KubeVersion.Version) }}
kind: PodDisruptionBudget
metadata:
  name: {{ include "foundry.name" $ }}
  namespace: {{ $.root.Release.Namespace }}
  labels:
    {{- include "foundry.labels" $ | nindent 4 }}
spec:
  maxUnavailable: {{ .maxUnavailable }}
  selector:
    matchLabels:
      {{- include "foundry.selectorLabels" $ | nindent 6 }}
{{- end }}
{{- end }}
{{- end -}}
