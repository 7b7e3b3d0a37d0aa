"""
The nginx configuration that does what the nginx-based ECR proxy does, with its defaults.
"""

KEEP_MANIFESTS = (
    "proxy_cache blobs; proxy_cache_key $uri; proxy_cache_valid 200 365d; proxy_ignore_headers Cache-Control;"
)
"""What has it keep manifests too, by path; the ECR proxy does not."""

TEXT = """
daemon off;
{user}
worker_processes 1;
worker_rlimit_nofile 16384;
pid {home}/nginx.pid;
error_log {home}/error.log warn;

events {{
    worker_connections 8192;
}}

http {{
    access_log {home}/access.log;
    sendfile on;
    keepalive_timeout 65s;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/temporary;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    # Blobs live here, by path, for a year; nothing else is kept, but where it is hits of manifests that are measured.
    proxy_cache_path {cache} keys_zone=blobs:16m levels=1:2 inactive=365d max_size=64g use_temp_path=off;

    server {{
        listen {address}{secure};
        {certificate}
        add_header Docker-Distribution-Api-Version registry/2.0 always;
        proxy_http_version 1.1;
        proxy_connect_timeout 3s;
        proxy_read_timeout 300s;
        proxy_request_buffering off;
        client_max_body_size 0;

        location /_health {{
            access_log off;
            return 200;
        }}

        location ~ ^/v2/.*/manifests/ {{
            proxy_pass {registry};
            proxy_set_header Authorization "Basic {secret}";
            proxy_set_header Connection close;
            {manifests}
        }}

        location ~ ^/v2/.*/blobs/[a-z0-9]+:[a-f0-9]+$ {{
            proxy_pass {registry};
            proxy_set_header Authorization "Basic {secret}";
            proxy_set_header Connection close;
            # ECR's redirect to a bucket is not the client's to follow, but the proxy's.
            proxy_intercept_errors on;
            error_page 301 302 307 = @bucket;
        }}

        location @bucket {{
            set $presigned $upstream_http_location;
            proxy_pass $presigned;
            proxy_set_header Authorization "";
            proxy_set_header Connection close;
            proxy_cache blobs;
            proxy_cache_key $uri;
            proxy_cache_valid 200 365d;
            proxy_cache_lock on;
            proxy_cache_use_stale error timeout invalid_header updating http_500 http_502 http_503 http_504;
            proxy_ignore_headers Cache-Control;
            add_header X-Cache-Status $upstream_cache_status;
        }}
    }}
}}
"""
