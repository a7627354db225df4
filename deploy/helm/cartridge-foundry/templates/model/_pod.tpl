{{/* The only pod that reaches the hub. */}}
{{- define "foundry.model.podTemplate" -}}
{{- $ctx := dict "root" $ "name" "model" -}}
{{- $hub := .Values.model.hub -}}
{{- $folder := include "foundry.model.folder" . -}}
metadata:
  labels:
    {{- include "foundry.selectorLabels" $ctx | nindent 4 }}
spec:
  restartPolicy: Never
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext:
    {{- include "foundry.podSecurityContext" . | nindent 4 }}
  {{- with include "foundry.scheduling" (dict "root" $ "name" "model" "values" dict) }}
  {{- . | trim | nindent 2 }}
  {{- end }}
  {{- if not $hub.id }}
  initContainers:
    - {{ include "foundry.model.copyContainer" (dict "root" $ "directory" (printf "/cache/%s.partial" $folder)) | nindent 6 | trim }}
  {{- end }}
  containers:
    - name: fetch-model
      image: {{ include "foundry.serviceImage" (dict "root" $ "name" "rollout") }}
      imagePullPolicy: {{ .Values.global.image.pullPolicy }}
      command: [python, -c]
      args:
        - {{ .Files.Get "files/fetch_model.py" | quote }}
        - /cache/{{ $folder }}
        {{- if $hub.id }}
        - {{ $hub.id | quote }}
        - {{ $hub.revision | quote }}
        {{- end }}
      env:
        - {name: HOME, value: /tmp}
        {{- /* The image says that there is no hub, which is so for the services. */}}
        - {name: HF_HUB_OFFLINE, value: "0"}
        {{- with $hub.endpoint }}
        - {name: HF_ENDPOINT, value: {{ . | quote }}}
        {{- end }}
        {{- if $hub.existingSecret }}
        - {name: HF_TOKEN_PATH, value: /run/secrets/foundry/hub/token}
        {{- end }}
      securityContext:
        {{- include "foundry.containerSecurityContext" . | nindent 8 }}
      resources:
        requests: {cpu: 250m, memory: 512Mi}
        limits: {memory: 2Gi}
      volumeMounts:
        - {name: model, mountPath: /cache}
        - {name: tmp, mountPath: /tmp}
        {{- if $hub.existingSecret }}
        - {name: hub-token, mountPath: /run/secrets/foundry/hub, readOnly: true}
        {{- end }}
  volumes:
    {{- include "foundry.model.volume" . | nindent 4 }}
    - name: tmp
      emptyDir: {sizeLimit: 8Gi}
    {{- with $hub.existingSecret }}
    - name: hub-token
      secret:
        secretName: {{ . }}
        items: [{key: {{ $hub.tokenKey }}, path: token}]
    {{- end }}
{{- end -}}
