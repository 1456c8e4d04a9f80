package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"causeway/agent/api"
	"causeway/clustermesh"
	"causeway/identity/pki"
	"causeway/lb/l7/xds"
)

// xdsPause is the least time between two rounds of news to clients: in a rolling update many rows change at once.
const xdsPause = 100 * time.Millisecond

// xdsCertTimeout bounds the wait for the store when a certificate is made.
const xdsCertTimeout = 5 * time.Second

// xdsFeed tells Envoys and gRPC's clients how services are balanced at L7.
type xdsFeed struct {
	tables    *clustermesh.Tables
	cluster   string
	authority func(context.Context) (*pki.Authority, error)
	hosts     []string // that the server's certificate is for
	now       func() time.Time

	mu     sync.Mutex
	by     *pki.Authority // that signed leaf
	serves *tls.Certificate
}

func newXDSFeed(a *agent) *xdsFeed {
	hosts := []string{a.cfg.Node.Address.String()}
	if at, err := netip.ParseAddrPort(a.cfg.XDS.Listen); err == nil && !at.Addr().IsUnspecified() && at.Addr() != a.cfg.Node.Address {
		hosts = append(hosts, at.Addr().String())
	}
	return &xdsFeed{tables: a.tables, cluster: a.cfg.Cluster.Name, authority: a.peering.Authority, hosts: hosts, now: a.clock.Now}
}

// Run serves clients at the listener until ctx ends.
func (x *xdsFeed) Run(ctx context.Context, listener net.Listener) error {
	server := xds.NewServer()
	failed := make(chan error, 1)
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		defer cancel()
		failed <- x.follow(ctx, server)
	}()
	err := server.Serve(ctx, listener, &tls.Config{MinVersion: tls.VersionTLS13, GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		return x.config(hello.Context())
	}})
	cancel()
	if err != nil {
		return fmt.Errorf("serving xDS: %w", err)
	}
	return <-failed
}

// follow keeps the server in step with the tables until ctx ends.
func (x *xdsFeed) follow(ctx context.Context, server *xds.Server) error {
	for {
		rows, changed := x.rows()
		if err := server.Set(xds.Resources(rows)); err != nil {
			return fmt.Errorf("xDS: %w", err)
		}
		select {
		case <-changed[0]:
		case <-changed[1]:
		case <-changed[2]:
		case <-ctx.Done():
			return nil
		}
		select {
		case <-time.After(xdsPause):
		case <-ctx.Done():
			return nil
		}
	}
}

// rows takes what resources are made of, and what closes when it changes.
func (x *xdsFeed) rows() (rows xds.Rows, changed [3]<-chan struct{}) {
	t := x.tables
	txn := t.DB.ReadTxn()
	routes, c1 := t.Routes.AllWatch(txn)
	targets, c2 := t.Targets.AllWatch(txn)
	reaches, c3 := t.Reaches.AllWatch(txn)
	rows = xds.Rows{Self: x.cluster, RTT: map[string]time.Duration{}}
	routed := map[string]bool{}
	for row := range routes {
		rows.Routes = append(rows.Routes, row.Object)
		routed[row.Object.Port.String()] = true
	}
	for row := range targets {
		if routed[row.Object.Port.String()] {
			rows.Targets = append(rows.Targets, row.Object)
		}
	}
	for row := range reaches {
		if ms := row.Object.RTT; ms > 0 {
			rows.RTT[row.Object.Cluster] = time.Duration(ms * float64(time.Millisecond))
		}
	}
	return rows, [3]<-chan struct{}{c1, c2, c3}
}

// config is what a client is met with: a certificate of the cluster's authority, made when it is needed and kept in memory alone, for one of the same.
func (x *xdsFeed) config(ctx context.Context) (*tls.Config, error) {
	ctx, cancel := context.WithTimeout(ctx, xdsCertTimeout)
	defer cancel()
	authority, err := x.authority(ctx)
	if err != nil {
		return nil, err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.serves == nil || !x.by.Cert.Equal(authority.Cert) || pki.Due(x.serves.Leaf, x.now()) {
		pair, err := authority.Issue(pki.Request{User: "xds", Server: true, Hosts: x.hosts}, x.now())
		if err != nil {
			return nil, err
		}
		cert, err := pair.TLS()
		if err != nil {
			return nil, err
		}
		x.by, x.serves = authority, &cert
	}
	clients := x509.NewCertPool()
	clients.AddCert(authority.Cert)
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*x.serves}, NextProtos: []string{"h2"}, Time: x.now,
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: clients,
		// A resumed session would carry a certificate that has ended since.
		SessionTicketsDisabled: true,
		VerifyConnection:       xdsMay,
	}, nil
}

// listenXDS opens the port that xDS is served at; nil if the configuration has none.
func listenXDS(address string) (net.Listener, error) {
	if address == "" {
		return nil, nil
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("xds.listen: %w: give it another port, or stop who listens there", err)
	}
	return l, nil
}

// xdsMay lets this cluster's own clients in alone: the authority signs for its peers too, who may know what is exported and no more.
func xdsMay(state tls.ConnectionState) error {
	if len(state.PeerCertificates) > 0 {
		switch state.PeerCertificates[0].Subject.CommonName {
		case pki.UserXDS, pki.UserAgent:
			return nil
		}
	}
	return fmt.Errorf("the certificate is not one of %s: make one with \"clustermesh certs issue\"", pki.UserXDS)
}

// xdsCertificate signs the request of a client of xDS, for as long as the authority's certificates last.
func (s *server) xdsCertificate(w http.ResponseWriter, r *http.Request) {
	var req api.XDSCertificateRequest
	if err := decode(r, &req); err != nil {
		answer(w, nil, err)
		return
	}
	authority, err := s.agent.peering.Authority(r.Context())
	if err != nil {
		answer(w, nil, err)
		return
	}
	cert, err := authority.Sign([]byte(req.Request), pki.Request{User: pki.UserXDS}, s.agent.clock.Now())
	if err != nil {
		answer(w, nil, invalid("%v", err))
		return
	}
	answer(w, api.XDSCertificate{Cert: string(cert), CA: string(authority.CertPEM())}, nil)
}
