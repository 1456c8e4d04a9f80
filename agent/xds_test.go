package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/netip"
	"testing"
	"time"

	"causeway/identity"
	"causeway/identity/pki"
	"causeway/lb"
)

func TestXDSTellsOfL7ServicesAlone(t *testing.T) {
	tables := newTables(t)
	x := &xdsFeed{tables: tables, cluster: "east"}
	port := lb.PortKey{Service: lb.Name{Namespace: "web", Name: "shop"}, Port: "80", Protocol: lb.TCP, Family: lb.IPv4}
	other := port
	other.Port = "81"
	put(t, tables, tables.Routes, lb.Route{Port: port, Number: 80, Options: lb.DefaultL7Options()})
	_, changed := x.rows()
	put(t, tables, tables.Targets,
		lb.Target{TargetKey: lb.TargetKey{Port: port, Address: netip.MustParseAddr("10.1.1.5"), Number: 8080}, Cluster: "east", Node: "node1"},
		lb.Target{TargetKey: lb.TargetKey{Port: other, Address: netip.MustParseAddr("10.1.1.5"), Number: 8081}, Cluster: "east", Node: "node1"})
	<-changed[1]
	put(t, tables, tables.Reaches, identity.Reach{Cluster: "west", RTT: 1.5}, identity.Reach{Cluster: "north"})
	rows, _ := x.rows()
	if rows.Self != "east" || len(rows.Routes) != 1 || len(rows.Targets) != 1 || rows.Targets[0].Port != port {
		t.Errorf("rows are %+v", rows)
	}
	if len(rows.RTT) != 1 || rows.RTT["west"] != 1500*time.Microsecond {
		t.Errorf("round trips are %v", rows.RTT)
	}
}

func TestXDSWantsACertificateOfTheCluster(t *testing.T) {
	east, err := pki.NewAuthority("east", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	west, err := pki.NewAuthority("west", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	listener, err := listenXDS("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	x := &xdsFeed{tables: newTables(t), cluster: "east", hosts: []string{"127.0.0.1"}, now: time.Now,
		authority: func(context.Context) (*pki.Authority, error) { return east, nil }}
	run(t, func(ctx context.Context) error { return x.Run(ctx, listener) })
	roots := x509.NewCertPool()
	roots.AddCert(east.Cert)
	for name, test := range map[string]struct {
		by   *pki.Authority
		user string
		ok   bool
	}{
		"a client's": {east, pki.UserXDS, true},
		"an agent's": {east, pki.UserAgent, true},
		"a peer's":   {east, pki.PeerUser("west"), false},
		"somebody's": {east, "client", false},
		"another's":  {west, pki.UserXDS, false},
		"none":       {nil, "", false},
	} {
		config := &tls.Config{RootCAs: roots, NextProtos: []string{"h2"}}
		if test.by != nil {
			pair, err := test.by.Issue(pki.Request{User: test.user}, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			cert, err := pair.TLS()
			if err != nil {
				t.Fatal(err)
			}
			config.Certificates = []tls.Certificate{cert}
		}
		conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", listener.Addr().String(), config)
		if err == nil {
			_ = conn.SetReadDeadline(time.Now().Add(patience))
			_, err = conn.Read(make([]byte, 9)) // the server's settings, or its refusal of the certificate
			conn.Close()
		}
		if (err == nil) != test.ok {
			t.Errorf("a client whose certificate is %s: %v", name, err)
		}
	}
}
