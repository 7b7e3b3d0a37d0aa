{{- define "ecr-proxy.labels" -}}
app.kubernetes.io/name: ecrproxy
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "ecr-proxy.settings" -}}
{{- $own := dict
  "PROXY_DNS_RESOLVER" "system"
  "PROXY_METRICS_LISTEN" "tcp:5002"
  "PROXY_DRAIN_SECONDS" "600"
  "PROXY_CACHE_LIMIT" .Values.cache.limit -}}
{{- if or .Values.credentials.roleArn .Values.credentials.podIdentity }}{{ $_ := set $own "AWS_INSTANCE_AUTH" "true" }}{{ end -}}
{{- if .Values.loadBalancer.enabled }}{{ $_ := set $own "PROXY_CONNECTIONS_PER_ADDRESS" "0" }}{{ end -}}
{{- if .Values.tls.secret }}
{{- $_ := set $own "PROXY_SSL_KEY" "/tls/tls.key" }}{{ $_ := set $own "PROXY_SSL_CERTIFICATE" "/tls/tls.crt" }}
{{- end }}
{{- /* Not merge: to that, false, 0 and "" are nothing, and ours would count. */}}
{{- range $name, $value := .Values.settings }}{{ $_ := set $own $name $value }}{{ end }}
{{- range $name, $value := $own }}
{{- /* Helm reads numbers as floating-point ones, and writes large ones as 1e+06. */}}
{{- if kindIs "float64" $value }}{{ if eq $value (float64 (int64 $value)) }}{{ $value = int64 $value }}{{ end }}{{ end }}
{{ $name }}: {{ $value | toString | quote }}
{{- end }}
{{- end }}

{{- define "ecr-proxy.mebibytes" -}}
{{- mul (regexFind "^[0-9]+" . | atoi) (get (dict "m" 1 "g" 1024 "t" 1048576) (regexFind "[mgt]" (lower .))) -}}
{{- end }}

{{- define "ecr-proxy.pod" -}}
{{- $limit := include "ecr-proxy.mebibytes" .Values.cache.limit | atoi }}
{{- $space := include "ecr-proxy.mebibytes" .Values.cache.space | atoi }}
{{- if lt (mul $space 100) (mul $limit 105) }}
{{- $least := printf "%dMi" (div (add (mul $limit 105) 99) 100) }}
{{- fail (printf "cache.space=%s is too little for cache.limit=%s: give %s or more, for a pod that fills it is evicted" .Values.cache.space .Values.cache.limit $least) }}
{{- end -}}
metadata:
  labels:
    app.kubernetes.io/name: ecrproxy
  annotations:
    # A pod that runs does not see that a setting has changed: another one is made.
    checksum/settings: {{ include "ecr-proxy.settings" . | sha256sum }}
spec:
  serviceAccountName: ecr-proxy
  # A Service called "proxy" would set PROXY_PORT.
  enableServiceLinks: false
  priorityClassName: {{ .Values.priorityClassName | quote }}
  # preStop, then PROXY_DRAIN_SECONDS, then a little.
  terminationGracePeriodSeconds: {{ .Values.loadBalancer.enabled | ternary 710 620 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 65532
    runAsGroup: 65532
    fsGroup: 65532
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  {{- if ne .Values.mode "daemonset" }}
  topologySpreadConstraints:
    {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          app.kubernetes.io/name: ecrproxy
    {{- end }}
  {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations: {{ toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: ecr-proxy
      image: {{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      envFrom:
        - configMapRef:
            name: ecr-proxy
        - secretRef:
            name: {{ .Values.credentials.secret }}
            optional: true
      ports:
        - name: registry
          containerPort: 5000
          {{- if eq .Values.mode "daemonset" }}
          hostPort: {{ .Values.hostPort }}
          hostIP: 127.0.0.1
          {{- end }}
        - name: metrics
          containerPort: 5002
      startupProbe:
        httpGet:
          path: /readyz
          port: metrics
        periodSeconds: 2
        timeoutSeconds: 5
        failureThreshold: 150
      readinessProbe:
        httpGet:
          path: /healthz
          port: metrics
        periodSeconds: 5
        timeoutSeconds: 5
      livenessProbe:
        httpGet:
          path: /healthz
          port: metrics
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      lifecycle:
        preStop:
          # Until nobody is sent here any more.
          sleep:
            seconds: {{ .Values.loadBalancer.enabled | ternary 90 5 }}
      {{- $resources := deepCopy .Values.resources }}
      {{- if ne .Values.mode "statefulset" }}
      {{- $resources = mergeOverwrite $resources (dict "requests" (dict "ephemeral-storage" .Values.cache.space)) }}
      {{- end }}
      resources: {{ toYaml $resources | nindent 8 }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
      volumeMounts:
        - name: cache
          mountPath: /cache
        - name: tmp
          mountPath: /tmp
        {{- if .Values.tls.secret }}
        - name: tls
          mountPath: /tls
          readOnly: true
        {{- end }}
        {{- if .Values.files.secret }}
        - name: files
          mountPath: /etc/ecrproxy
          readOnly: true
        {{- end }}
  volumes:
    - name: tmp
      emptyDir:
        sizeLimit: 64Mi
    {{- if ne .Values.mode "statefulset" }}
    - name: cache
      emptyDir:
        sizeLimit: {{ .Values.cache.space }}
    {{- end }}
    {{- if .Values.tls.secret }}
    - name: tls
      secret:
        secretName: {{ .Values.tls.secret }}
        defaultMode: 0440
    {{- end }}
    {{- if .Values.files.secret }}
    - name: files
      secret:
        secretName: {{ .Values.files.secret }}
        defaultMode: 0440
    {{- end }}
{{- end }}
